"""A kit that judges a client, a worker or a broker in any language by the rules of SPEC.md."""
