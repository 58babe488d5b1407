"""The commands of `ipdiverse`: each is a typed config with `run`; heavy imports happen in there."""
