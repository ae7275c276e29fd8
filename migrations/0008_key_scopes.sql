-- What a key may do: 'check' asks whether addresses may be written to, 'read' also reads the list, 'write' also changes it. Keys from before
-- this migration could do everything.
ALTER TABLE api_keys ADD COLUMN scope text NOT NULL DEFAULT 'write' CHECK (scope IN ('check', 'read', 'write'));
