"""Stage: a checkpoint becomes the file a device runs, held against its source before anybody trusts it."""
