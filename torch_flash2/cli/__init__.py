"""The commands of `python -m torch_flash2`.

Each module has `add_arguments(parser)` and `main(arguments)`, which returns the exit status.
"""
