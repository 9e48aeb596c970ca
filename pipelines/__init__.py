"""Ray and MLflow around albef_core: ingest, feed, train, evaluate, track."""
