"""Callbacks for other training libraries; each module needs its library."""
