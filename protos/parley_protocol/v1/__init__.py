"""Wire messages between the roles: generated code, import path = path of the `.proto` file."""
