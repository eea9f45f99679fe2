"""What `python -m bench serve` is made of: encoders in the runtimes that serve them.

`contenders` makes the models and their graphs, `padded` the form in which exporters write a dense model,
`worker` is the process that runs one of them, `rounds` lets one worker at a time run, `aims` says what is to
be reached, `tables` and `picture` show what was. `quality` measures what the same graphs answer.
"""
