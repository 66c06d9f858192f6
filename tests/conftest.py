"""For all tests."""

from hypothesis import settings

settings.register_profile("any machine", deadline=None)  # on a busy one the first example of many can take seconds
settings.load_profile("any machine")
