"""What a run is: every number, what must hold between them, and where each came from. No torch here."""
