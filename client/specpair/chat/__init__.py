"""`specpair chat`: a conversation on one session, with or without a terminal."""
