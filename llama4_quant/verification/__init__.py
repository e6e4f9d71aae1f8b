"""Is a converted checkpoint whole, and how far is it from its source? Damage is data here: a list of problems."""
