"""What stands before and behind the model: it normalises a text, reads it by rules and by a classifier, and says what may pass."""
