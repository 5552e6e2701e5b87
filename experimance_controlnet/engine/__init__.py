"""What runs on the device. Knows neither HTTP nor pydantic."""
