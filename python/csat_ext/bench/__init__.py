"""What `csat bench` measures: kernels on this machine beside its ceilings, and one revision beside another."""
