"""Binary masks: kept, saved, applied, enforced."""
