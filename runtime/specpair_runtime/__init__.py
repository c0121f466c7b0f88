"""What the target service and the draft service share: models, sampling, serving."""
