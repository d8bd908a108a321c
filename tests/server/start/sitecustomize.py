"""Python reads this when a test's server starts: garbage is collected less often.

Importing vLLM makes a million objects that stay, and with Python's own thresholds a fifth of the
time goes into looking for garbage among them, in each of a server's four to eight processes.
"""

import gc

gc.set_threshold(100_000, 20, 100)
