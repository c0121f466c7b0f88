"""Generated from protos/specpair/v1; never edited."""
