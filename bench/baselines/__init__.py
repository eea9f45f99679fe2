"""The peers: each a function from `FFNInputs` to an `Implementation`, weights laid out as that peer wants them."""
