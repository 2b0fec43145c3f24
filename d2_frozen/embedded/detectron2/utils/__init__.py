"""Small tools: registry, logging, events, distributed helpers, files. Import the module you need."""
