-- When the person opted out, where another system knows it. A row without one has no more bytes than before: the bitmap of its empty
-- columns fits into the padding of the row's header.
ALTER TABLE entries ADD COLUMN unsubscribed_at timestamptz;
