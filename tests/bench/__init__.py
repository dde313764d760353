"""Measurements that are no tests: each is run as a module and prints a table."""
