"""One module per experiment, each run by `python -m experiments.<name>`."""
