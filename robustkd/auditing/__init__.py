"""The audit of a deployed artifact: worst case per image over replayed, surrogate and black-box attacks."""
