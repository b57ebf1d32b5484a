"""Property tests say the same every time: derandomised, no example database, no deadline on a busy machine."""

from hypothesis import settings

settings.register_profile("llmos", derandomize=True, database=None, deadline=None, max_examples=100)
settings.load_profile("llmos")
