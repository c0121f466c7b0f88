"""The draft service: proposes what the target will probably say."""
