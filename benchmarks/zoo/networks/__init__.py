"""Networks rebuilt in torch, to be exported with published weights."""
