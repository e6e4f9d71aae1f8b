"""Offline conversion: a plan carried out from a source to an output, resumable, on threads and on several machines."""
