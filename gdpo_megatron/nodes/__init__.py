"""What the nodes of a job do beside training: meet, compare notes, watch one another, report."""
