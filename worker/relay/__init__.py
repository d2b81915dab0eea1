"""A broker as a worker of another broker: the requests of the upper bus run on the lower one."""
