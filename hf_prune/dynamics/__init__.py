"""Training as a dynamical system: exponents of many series at once, and what causes what."""
