"""The demo that ``sfpk demo`` runs; needs the ``demo`` extra."""
