"""The releases of other people's libraries: the tested set, and the tests with other sets."""
