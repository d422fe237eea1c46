"""`python -m pipeline report`: what one run or several did, as a page."""
