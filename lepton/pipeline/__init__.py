"""The whole loop composed; ``lepton.pipeline.demo`` runs it."""
