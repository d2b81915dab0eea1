"""The HTTP door of the bus: OpenAI's API, the older controller and worker API, and the web page.

A gateway is a client of the bus like any other, keeps no state that another gateway would need for
serving a new request, so several can run side by side. Importing this package imports nothing
heavy; `app.create_app` builds the application, `python -m client.gateway` serves it.
"""
