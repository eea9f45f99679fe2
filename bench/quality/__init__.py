"""Quality: ways to make an encoder cheaper, compared on real tasks with one budget for all."""
