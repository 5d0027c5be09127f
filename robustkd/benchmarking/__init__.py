"""Stage: how long artifacts take, side by side on this machine."""
