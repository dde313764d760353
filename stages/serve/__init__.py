"""The service: engine, chat template, guard and API. Light imports: a Bento has no torch in it."""
