"""What may be set: typed settings, profiles, notebook parameters, and what is refused before work starts."""
