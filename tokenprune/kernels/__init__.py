"""What scoring and matching need and eager attention does not give: one folder an operation, each with a naive
`reference` beside the implementation, which the tests compare."""
