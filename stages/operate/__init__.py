"""The verbs on the repository and the live service, behind the `trunkline` command."""
