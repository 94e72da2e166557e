"""`twa` inside other trainers: each module needs its framework, and none is imported unless used."""
