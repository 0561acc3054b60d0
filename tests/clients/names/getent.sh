# getent: the address of each name in a family, as "name 4 name 6 …".
while [ $# -gt 1 ]; do
    answer=$(getent "ahostsv$2" "$1") && echo "$answer" | awk '{ print $1; exit }' || echo "exit code $?"
    shift 2
done
