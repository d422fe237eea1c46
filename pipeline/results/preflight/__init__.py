"""`python -m launch.preflight`: whether the machines of a job are fit for it, before anything is loaded."""
