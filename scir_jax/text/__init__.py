"""Chat and judge templates to token ids. Text of users and models never becomes a control token."""
