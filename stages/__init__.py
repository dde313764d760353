"""The pipeline: one module per batch stage, run as `python -m stages.<name>`; `serve/` the service, `operate/` the verbs."""
