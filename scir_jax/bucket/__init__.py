"""Google Cloud Storage: a run, models, data and outputs below gs://BUCKET/PATH."""
