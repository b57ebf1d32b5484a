"""Property tests say the same every time: derandomised, no example database, no deadline on a busy machine. By hand,
`--hypothesis-profile=llmos-long` says something new every time."""

from hypothesis import settings

settings.register_profile("llmos", derandomize=True, database=None, deadline=None, max_examples=100)
settings.register_profile("llmos-long", database=None, deadline=None, max_examples=3000, print_blob=True)
settings.load_profile("llmos")
