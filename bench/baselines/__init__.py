"""The peers: functions from `FFNInputs` to an `Implementation`, weights laid out as each wants them."""
