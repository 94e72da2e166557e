"""`twa` inside other trainers. Each module needs its framework, and is imported by who uses it."""
