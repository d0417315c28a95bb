// Package file is the source that reads a directory of manifests, for a node
// without an API server: Services, EndpointSlices, Nodes and ServiceCIDRs in
// YAML or JSON, several objects to a file if need be. The directory is watched
// (its sub-directories are not), and only objects that really changed are told.
//
// A document that cannot be read never takes others down. It is reported with
// file, line and reason; as long as a file holds such a document, the objects
// that the file gave before go on being served, as far as its readable
// documents do not say otherwise. The same holds for a file, or the whole
// directory, that cannot be read at all.
//
// A directory in which no manifest is found any more, as where a file system is
// not mounted, keeps its objects for 30 s. Files that are removed one by one take
// their objects along at once. A path that leads to another directory is noticed
// within a second.
//
// A file of more than 1 MiB is read beside the others, which do not wait for it.
// It is parsed only if the name of a kind that is read occurs in it.
//
// Endpoints objects are passed over with a warning: only EndpointSlices count.
//
// Where two files hold the same object, the file whose name sorts first wins.
package file
