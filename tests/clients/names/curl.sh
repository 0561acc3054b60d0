# curl: what it dials for each name in a family, as "name 4 name 6 …"; for a name of a service also that it is served.
while [ $# -gt 1 ]; do
    reply=$(curl -sv "-$2" --connect-timeout 2 "http://$1:8080" 2>&1)
    code=$?
    dialled=$(printf '%s\n' "$reply" | sed -n 's/.*Trying \(.*\):8080.*/\1/p')
    case "$reply" in *"
echo"*) dialled="$dialled, served" ;; esac
    echo "${dialled:-exit code $code}"
    shift 2
done
