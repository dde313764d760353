"""The pieces of preprocess as datatrove pipeline steps. Importing one imports datatrove (1.4 s): do it inside functions."""

from loguru import logger

logger.disable("datatrove")  # its task logs; what fails is raised, and told in a sentence by stages.run
